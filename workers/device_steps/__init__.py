"""Steps that a GPU takes without the host, recorded as graphs; imports the shard and `sampling`."""
