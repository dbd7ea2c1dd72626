"""The commands of `sdpo`, one file each."""
