"""What belongs to the GPU kernel: devices, how its work is cut, and what a thread block does."""
