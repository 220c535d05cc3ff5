"""A shop's help desk: customers, orders and stock in SQLite, a policy, and users who ask for several things."""
