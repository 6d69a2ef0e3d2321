"""What any distributed PyTorch program of this kind needs: processes, statistics, files."""
