"""What is known of the software in the guest, and what of its text: a Linux kernel, or a bare program."""
