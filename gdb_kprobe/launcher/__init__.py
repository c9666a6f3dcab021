"""The ``gdb-kprobe`` command of the shell: the harness's verbs, and those that need gdb and the plugin."""
