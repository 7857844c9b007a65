"""Commands on a system that fails: at the n-th call of each kind, killed, with too little of something, on a full disk."""
