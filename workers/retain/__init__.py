"""What is kept of each row, and what goes on; imports the shard and what it is made of, no pass."""
