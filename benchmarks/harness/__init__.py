"""What several benchmarks share: limits of the machine, engines in steps, servers, peers."""
