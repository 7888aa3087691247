"""`LagrangeRegressor` beside its peers, and the figures of the paper."""
