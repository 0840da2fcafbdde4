"""Augment a bright training sample to the population that a survey sends, after Boone 2019 (AJ 158, 257, Avocado).

`augmentation` makes one new light curve from one of the sample; the other modules are its parts, one technique each.
"""
