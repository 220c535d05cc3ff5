"""The shop: its tables in SQLite, and what can be done to them.

Mechanics only. What a clerk *may* do is the policy's matter (``tasks.POLICY``) and is judged by the final tables: the
shop itself would cancel a parcel that is on its way. Money is in cents, dates are ISO dates.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from agentopd.errors import ToolError
from agentopd.types import JSON

COLUMNS = {
    "customers": ("customer_id", "name", "email", "gift_cents"),
    "stock": ("item_id", "product", "option", "price_cents", "available"),
    "orders": ("order_id", "customer_id", "status", "delivered_on", "address", "paid_with", "reason", "note"),
    "lines": ("line_id", "order_id", "item_id", "state"),
    "refunds": ("refund_id", "order_id", "cents", "paid_to"),
}
"""Of each table the columns, the primary key first."""


class Shop:
    """One episode's shop, in memory. ``close`` it."""

    def __init__(self, tables: JSON) -> None:
        self._db = sqlite3.connect(":memory:")
        self._db.row_factory = sqlite3.Row
        for table, columns in COLUMNS.items():
            self._db.execute(f"CREATE TABLE {table} ({columns[0]} PRIMARY KEY, {', '.join(columns[1:])})")
            marks = ", ".join("?" for _ in columns)
            rows = [[row[column] for column in columns] for row in tables.get(table, {}).values()]
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    def tables(self) -> JSON:
        """All rows by table and primary key."""
        return {
            table: {str(row[0]): dict(row) for row in self._db.execute(f"SELECT * FROM {table} ORDER BY rowid")}
            for table in COLUMNS
        }

    def close(self) -> None:
        """Forget everything; idempotent."""
        self._db.close()

    def customer(self, email: str) -> JSON:
        """A customer by e-mail address, with the orders' ids."""
        customer = self._one("customers", "email", email.strip().lower(), "customer with e-mail address")
        orders = self._db.execute("SELECT order_id FROM orders WHERE customer_id = ?", (customer["customer_id"],))
        return {**customer, "orders": [row[0] for row in orders]}

    def order(self, order_id: str) -> JSON:
        """An order with its lines."""
        order = self._one("orders", "order_id", order_id, "order")
        return {**order, "lines": self._lines(order_id)}

    def options(self, product: str) -> list[JSON]:
        """The options of a product, with prices and how many there are."""
        rows = self._db.execute("SELECT * FROM stock WHERE lower(product) = ?", (product.strip().lower(),)).fetchall()
        if not rows:
            names = [row[0] for row in self._db.execute("SELECT DISTINCT product FROM stock")]
            raise ToolError(f"no product {product!r}; there is: {', '.join(names)}")
        return [dict(row) for row in rows]

    def cancel(self, order_id: str, reason: str) -> int:
        """Cancel an order: its items go back to stock, what was paid is refunded; returns the cents."""
        order = self.order(order_id)
        if order["status"] == "cancelled":
            raise ToolError(f"order {order_id} is cancelled already")
        open_lines = [line for line in order["lines"] if line["state"] == "ordered"]
        for line in open_lines:
            self._restock(line["item_id"], 1)
        self._set("orders", order_id, status="cancelled", reason=reason)
        return self._refund(order, sum(line["price_cents"] for line in open_lines))

    def readdress(self, order_id: str, address: str) -> None:
        """Send an order elsewhere."""
        self.order(order_id)
        self._set("orders", order_id, address=address)

    def take_back(self, order_id: str, line_id: str) -> int:
        """Return one line of an order; returns the cents refunded."""
        order, line = self.order(order_id), self._open_line(order_id, line_id)
        self._set("lines", line_id, state="returned")
        self._restock(line["item_id"], 1)
        return self._refund(order, line["price_cents"])

    def exchange(self, order_id: str, line_id: str, item_id: str) -> int:
        """Swap the item of one line for another that is in stock; returns the cents refunded, below 0 if charged."""
        order, line = self.order(order_id), self._open_line(order_id, line_id)
        item = self._one("stock", "item_id", item_id, "item")
        if item["available"] < 1:
            raise ToolError(f"item {item_id} is not in stock")
        self._restock(line["item_id"], 1)
        self._restock(item_id, -1)
        self._set("lines", line_id, item_id=item_id, state="exchanged")
        return self._refund(order, line["price_cents"] - item["price_cents"])

    def _lines(self, order_id: str) -> list[JSON]:
        joined = "SELECT lines.*, product, option, price_cents FROM lines JOIN stock USING (item_id) WHERE order_id = ?"
        return [dict(row) for row in self._db.execute(joined, (order_id,))]

    def _open_line(self, order_id: str, line_id: str) -> JSON:
        for line in self._lines(order_id):
            if line["line_id"] == line_id and line["state"] == "ordered":
                return line
        raise ToolError(f"order {order_id} has no open line {line_id!r}")

    def _one(self, table: str, column: str, value: str, what: str) -> JSON:
        row = self._db.execute(f"SELECT * FROM {table} WHERE {column} = ?", (value,)).fetchone()
        if row is None:
            raise ToolError(f"no {what} {value!r}")
        return dict(row)

    def _set(self, table: str, key: str, **values: Any) -> None:
        columns: Sequence[str] = list(values)
        changes = ", ".join(f"{column} = ?" for column in columns)
        self._db.execute(f"UPDATE {table} SET {changes} WHERE {COLUMNS[table][0]} = ?", (*values.values(), key))

    def _restock(self, item_id: str, count: int) -> None:
        self._db.execute("UPDATE stock SET available = available + ? WHERE item_id = ?", (count, item_id))

    def _refund(self, order: JSON, cents: int) -> int:
        number = self._db.execute("SELECT count(*) FROM refunds").fetchone()[0] + 1
        row = (f"R{number}", order["order_id"], cents, order["paid_with"])
        self._db.execute("INSERT INTO refunds VALUES (?, ?, ?, ?)", row)
        if order["paid_with"] == "gift card":
            spent = "UPDATE customers SET gift_cents = gift_cents + ? WHERE customer_id = ?"
            self._db.execute(spent, (cents, order["customer_id"]))
        return cents
