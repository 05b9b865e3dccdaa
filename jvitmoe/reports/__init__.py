"""Several runs compared, and what is written of one: tables, pages, figures."""
