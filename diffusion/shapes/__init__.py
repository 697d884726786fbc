"""ShapesWorld: a procedural text-to-image world with the six tasks of GenEval and an exact detector.

Pictures are 32 x 32 pixels: a grid of 4 x 4 cells, at most one object in a cell.
"""
