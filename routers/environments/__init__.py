"""Agent environments behind one protocol, and executors that act in them."""
