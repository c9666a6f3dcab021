"""The only package that imports gdb: the plugin itself, and the commands."""
