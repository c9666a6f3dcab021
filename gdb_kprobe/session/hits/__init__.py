"""What happens at a hit: in the guest, through the stub, in a single step."""
