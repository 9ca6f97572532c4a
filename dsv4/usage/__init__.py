"""Usage of a server and its worth: a ledger of requests in a database, and price lists by model, date and hour."""
