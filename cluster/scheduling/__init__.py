"""Who runs in the next step, in integers. No torch, no Ray, no clock; imports `reuse`."""
