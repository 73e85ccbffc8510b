"""Some rows of a datastore, and the parts that they are cut into."""

import numpy as np

SIZES, DIMENSION, VOCABULARY = [300, 7, 500], 8, 300
CUTS = np.cumsum([0, *SIZES])
