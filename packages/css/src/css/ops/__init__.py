"""Pure tensor functions of continual segmentation: no state, no logging, no trainer."""
