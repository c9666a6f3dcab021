"""The one piece of guest memory that holds all that is added to a guest: what is in it, and whose it is."""
