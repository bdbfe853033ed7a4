"""The rooms behind the commands in bench/: what each measures, and what they share (`common`)."""
