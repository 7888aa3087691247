"""Convex solvers with certificates, and the subspace of the linearised refinement; `problem` is what they share."""
