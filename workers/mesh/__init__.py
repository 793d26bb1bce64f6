"""How ranks divide a model and talk, the only set-up of torch.distributed; imports `native`."""
