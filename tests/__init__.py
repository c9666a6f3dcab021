"""The tests (``unit``, ``gdb``, ``live``), and the rooms: packages that tests use and commands of ``./install.sh`` run.

They stand in this order: ``support``, ``proof``, then ``torture``, ``bench`` and ``matrix``. The installed package
imports none of them.
"""
