"""LReg as a method of regression: scikit-learn and SciPy on the numerical core, without PEFT."""
