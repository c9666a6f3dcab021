"""What the tests and the other rooms share. It knows no room beside it."""
