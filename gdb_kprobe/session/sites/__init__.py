"""The places in the guest's text: planned, armed, moved from rung to rung, restored."""
