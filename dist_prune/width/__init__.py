"""Width: hidden channels that can be removed from a network, and the layers that change with them."""
