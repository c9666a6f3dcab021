"""The proof that moved and stepped instructions do what the originals do: forms, machines that run them, comparison.

Needs an emulator and a second decoder (unicorn, iced), which the package does not.
"""
