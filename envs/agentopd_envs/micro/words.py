"""The names that fill the templates; small on purpose, so that a tiny vocabulary covers them."""

PEOPLE = ("Ann", "Bob", "Cal", "Dee", "Eve", "Fay", "Gus", "Hal")
ITEMS = ("pears", "plums", "figs", "limes", "kiwis", "dates", "beans", "nuts")
