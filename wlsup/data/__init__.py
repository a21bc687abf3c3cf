"""Pictures and captions: sources, subsets, augmentation, loaders and evaluation sets."""
