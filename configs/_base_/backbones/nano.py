# A narrow FlashInternImage for the demos, trained from scratch.
backbone = dict(arch="nano")
channels = [32, 64, 128, 256]  # of the four stages
