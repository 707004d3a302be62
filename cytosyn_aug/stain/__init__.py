"""How tissue is stained: statistics, references, and colour maps that move no nucleus."""
