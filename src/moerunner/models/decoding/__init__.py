"""What a Transformers model lacks to make one token after the other at the speed of the hardware."""
