"""What the processor promises of memory that is read from outside: page tables, the IDT; and bounds for each reader."""
