"""slim: a compiler that makes transformer models smaller and faster."""
