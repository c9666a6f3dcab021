"""Making what a guest boots: kernels from Debian's packages, the initramfs, the bare-metal image."""
