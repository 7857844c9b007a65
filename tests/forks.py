"""To be imported by processes that fork, before anything computes: they have no GPU.

A child cannot use one that its parent has begun to use, and looking whether there is one may be such a beginning.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
