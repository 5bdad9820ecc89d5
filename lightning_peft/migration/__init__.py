"""Static analysis of Lightning code bases that use PEFT."""
