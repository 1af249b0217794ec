"""One run on disk and on the screen: folder, records, tracking, progress; and what every command line shares."""
