"""The proof that moved and stepped instructions do what the originals do: forms, machines that run them, comparison.

Needs what only tests need (unicorn, iced), which is why nothing outside of tests imports it.
"""
