"""What the directories of runs tell: states, scores, comparisons, studies, pages."""
