"""Boxes on images: scenes with COCO annotations, augmentation that moves boxes, loaders, the set loss, AP."""
