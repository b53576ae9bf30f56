"""What reports on the implementations: explain, selfcheck and the stopwatch."""
