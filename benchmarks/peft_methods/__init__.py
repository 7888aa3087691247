"""Every tuner of PEFT beside LReg."""
