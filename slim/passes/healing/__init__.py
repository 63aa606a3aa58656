"""Training a compressed Program beside the original: what is trained, towards what, and the loop."""
