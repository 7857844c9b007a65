"""What merging an adapter into a checkpoint must give: tiny models, adapters that PEFT and its users write, and the truth.

``cases.CASES`` is the catalogue. A case is built once for a folder: a model on disk, adapters beside it, and float64 tensors
under the names of the checkpoint.
"""
