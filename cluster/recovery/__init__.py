"""How an engine survives its workers: notice that they are lost, and decide what follows."""
