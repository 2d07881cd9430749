"""Hard negatives: who proposes candidates, who judges them."""
