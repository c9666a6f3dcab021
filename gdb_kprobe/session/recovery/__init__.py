"""What earlier sessions have left in a guest, and how it is taken back."""
