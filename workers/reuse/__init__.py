"""Keys and values that no slot holds: blocks of prefixes, parked rows; imports `kv`, `state`."""
