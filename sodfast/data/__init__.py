"""Data for training: pairs on disk, a decoded cache, batched augmentation, synthetic scenes."""
